"""A source of tiny synthetic subjects for the data factory, and a command that runs it."""

from __future__ import annotations

import argparse
import dataclasses
import time

from data_prep import factory
from data_prep.workers import SubjectRejected
from spinmeround_jax import cli
from tests.support import synthetic_shards

SIZE, VIEWS = 16, 3


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """`count` training subjects and one held out; those in `bad` are rejected."""

    count: int = 9
    bad: tuple[int, ...] = ()
    seconds: float = 0.0  # that a subject takes

    def subjects(self):
        names = [f"person-{number}" for number in range(self.count + 1)]
        return {"train": names[:-1], "held_out": names[-1:]}

    def records(self, subject):
        number = int(subject.rpartition("-")[2])
        time.sleep(self.seconds)
        if number in self.bad:
            raise SubjectRejected(f"number {number} is no good")
        return synthetic_shards.make_records(number, VIEWS, SIZE)

    def settings(self):
        return {"count": self.count, "range": (1, 2)}

    def manifest(self):
        return {
            "image_size": SIZE,
            "views": VIEWS,
            "seed": 0,
            "source": "synthetic",
            "license": "CC0-1.0",
        }


def run(args: argparse.Namespace) -> None:
    factory.run(Synthetic(args.count, (4,), args.seconds), args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    factory.add_arguments(parser)
    parser.add_argument("--count", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.0)
    cli.end(cli.main(parser.parse_args, run))
