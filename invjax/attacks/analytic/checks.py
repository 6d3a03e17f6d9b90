"""What the algebraic attacks ask of an observation."""

from invjax.base import Observation
from invjax.observe import check_sgd


def check_one_step(observation: Observation, name: str) -> None:
    """Refuse an update of several local steps, or of another optimizer than plain SGD.

    Args:
      observation: what the adversary was granted.
      name: the attack's, for the message.

    Raises:
      ValueError: there was more than one step, or another optimizer.
    """
    check_sgd(observation)
    local = observation.facts.local
    if local is not None and local.num_steps != 1:
        raise ValueError(
            f"{name} reads the gradient of one step, got an update of {local.num_steps} local steps."
        )
