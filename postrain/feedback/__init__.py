"""Feedback that no person gave: judges, constitutions, oversight of the strong.

`judges` prefer one completion to another and label pairs for the stage on
preferences, `principles` make a constitution that criticises and revises, and
`oversight` says how often a weak judge sees through a stronger policy.
"""

from postrain.feedback.judges import Judge as Judge
from postrain.feedback.judges import both_orders as both_orders
from postrain.feedback.judges import labelled as labelled
from postrain.feedback.judges import language_model as language_model
from postrain.feedback.judges import reward_model as reward_model
from postrain.feedback.judges import rule as rule
from postrain.feedback.principles import Principle as Principle
from postrain.feedback.principles import Revision as Revision
from postrain.feedback.principles import constitution as constitution
from postrain.feedback.principles import revised as revised
from postrain.feedback.principles import violations as violations
