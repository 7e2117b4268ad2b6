"""The end of a decoder, in which no token sees another."""

from flax import nnx
from jaxtyping import Array, Float

from vlmlora.nn.linear import Embedding, Linear
from vlmlora.nn.low_rank import running_rarely
from vlmlora.nn.stack import last_layer


class Tail(nnx.Module):
    """What follows a decoder's last attention: a feed-forward block, the final norm and the head.

    A loss needs them of the tokens that have labels alone.

    Attributes:
        layer: the last layer, whose method `feed_forward` is its second half.
        norm: the final norm.
        head: what turns hidden states into logits: a layer, or the embedding that it is tied to.
    """

    def __init__(self, layers: nnx.Module, norm: nnx.Module, head: Linear | Embedding):
        self.layer = last_layer(layers)
        self.norm = norm
        self.head = head

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """The residual stream after the last attention → final hidden states."""
        with running_rarely():
            x = self.layer.feed_forward(x)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Logits of final hidden states."""
        return apply_head(self.head, hidden)


def apply_head(
    head: Linear | Embedding, hidden: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch vocab"]:
    """Logits of final hidden states, from a layer or from the embedding that it is tied to."""
    return head(hidden) if isinstance(head, Linear) else hidden @ head.as_head()
