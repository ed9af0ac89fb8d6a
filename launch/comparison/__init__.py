"""What compare_engines.py is made of: one module for each engine, and what a run of any engine reports."""
