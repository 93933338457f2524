"""Programs that stand in for gcloud, sbatch and the like: they record their arguments."""

import json
import pathlib
import sys
import time

import pytest

# Rules are read from rules.json: (words that stand in a call, [replies, of which the last stays]).
PROGRAM = """#!{python} -IS
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
tool = os.path.basename(sys.argv[0])
stdin = "" if sys.stdin.isatty() else sys.stdin.read()
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps([tool, *sys.argv[1:]]) + "\\n")
(folder / "stdin").write_text(stdin)
rules = json.loads((folder / "rules.json").read_text()) if (folder / "rules.json").exists() else []
for i, (words, replies) in enumerate(rules):
    if all(any(word in argument for argument in [tool, *sys.argv[1:]]) for word in words):
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        (folder / "rules.json").write_text(json.dumps(rules))
        print(reply.get("out", ""), end="")
        print(reply.get("err", ""), end="", file=sys.stderr)
        sys.exit(reply.get("code", 0))
"""


class Tools:
    """Fake tools on the PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def add(self, *names: str) -> None:
        for name in names:
            path = self.folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(PROGRAM.format(python=sys.executable, folder=str(self.folder)))
            path.chmod(0o755)

    def reply(self, *rules) -> None:
        """(words that all stand in a call, [replies, the last for ever]); the first rule that fits."""
        (self.folder / "rules.json").write_text(json.dumps(rules))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def stdin(self) -> str:
        return (self.folder / "stdin").read_text()


@pytest.fixture(name="tools")
def fake_tools(tmp_path, monkeypatch):
    folder = tmp_path / "tools"
    (folder / "bin").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.01)))
    return Tools(folder)


def run(main, *argv: str) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    return ended.value.code


def commands_of(out: str) -> list[str]:
    """The lines of a dry run that are commands."""
    return [line for line in out.splitlines() if line and not line.startswith("#")]
