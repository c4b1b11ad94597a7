"""Answers for operators: why a user's job ran or did not (`why`), for what one waits (`waits`), and when the next come (`coming`).

The store gives the facts (`store.evidence`), `past`, `waiting` and `future` derive answers from them, without a clock or I/O, and `ask`
brings the two together.
"""

from taskplatform.answers.ask import MOST_ANSWERS, coming, waits, why
from taskplatform.answers.values import Answer, Coming, Moment, Outcome, Waits

__all__ = ["MOST_ANSWERS", "Answer", "Coming", "Moment", "Outcome", "Waits", "coming", "waits", "why"]
