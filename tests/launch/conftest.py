import pytest

from tests.launch import jobs


@pytest.fixture(scope="session")
def text(once):
    def write(folder):
        path = folder / "text.txt"
        path.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(500)))
        return path

    return once("text", write)


@pytest.fixture(scope="session")
def sharded(text, once):
    """Twelve steps of ShardedLion on two ranks, never stopped, a checkpoint every five: (folder, what it printed)."""

    def run(out):
        flags = [*jobs.TINY, "--data", text, "--steps", 12, "--checkpoint-every", 5, "--out", out]
        result = jobs.run(jobs.torchrun(2, jobs.COMPARE, *flags))
        assert result.returncode == 0, result.stdout
        return out, result.stdout

    return once("sharded", run)
