"""Engines that shard by themselves, taught to use this Lion. Each framework is imported inside the functions."""
