"""What the algebraic attacks ask of an observation."""

from invjax.base import Model, Observation
from invjax.models.layers import dense_layers


def check_algebraic(
    model: Model, observation: Observation, name: str, *, first_bias: bool = False
) -> None:
    """Refuse what linear algebra on one gradient cannot use.

    Args:
      model: the model under attack.
      observation: what the adversary was granted.
      name: the attack's, for messages.
      first_bias: whether the first dense layer must have a bias.

    Raises:
      ValueError: no fully connected ReLU network, no bias where one is needed, or an observation of
        several local steps.
    """
    local = observation.facts.local
    if local is not None and local.num_steps != 1:
        raise ValueError(
            f"{name} reads the gradient of one step, got an update of {local.num_steps} local steps."
        )
    first = dense_layers(model, observation.params)[0]
    if first_bias and first.bias is None:
        raise ValueError(f"{name} needs a bias in the first layer of {model.name}.")
