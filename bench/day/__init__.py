"""A day of the platform in simulated time, which people live through who change their minds, and what then really happened.

The store with all its scripts on a real Valkey, the planner and `Platform` are the real ones; only the clock is ours, and the workers'
processes: what runs takes a simulated time and ends as a seeded random number says.

- `engine` lets time pass: the planner by its own "how long until there is more to do", workers that take, start, end and lose jobs.
- `rules` says when schedules are due, by looking at every minute: nothing of `taskplatform.schedule`.
- `book` writes down what was done and seen, and says of each occurrence what must have become of it.
- `town` is the definitions and the users of the day, `people` what they do in it, `ask` what is asked meanwhile.
- `judge` holds the platform's answers against the book.
- `past` fills a Redis with a day of past on many subscriptions of the shipped definitions.

`python -m bench day --help` runs it by hand.
"""

from bench.day.command import main

__all__ = ["main"]
