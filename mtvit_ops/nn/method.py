"""What an adaptive method may do to a vision transformer, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from ..ragged import RaggedTokens
from .block_run import BlockRun, blocks_

if TYPE_CHECKING:
    from .vision_transformer import VisionTransformer, ViTConfig

_POINTS = ("before_block", "scores_at", "after_attention", "after_block")  # between the embedding and the readout


class Method(nn.Module):
    """Base of all methods: the dense transformer, with named points to override.

    A method holds its configuration (``config``, a frozen dataclass) and its parameters, never the state of a forward
    pass: that travels through arguments and return values, as the method's own named tuple.
    """

    config_class: ClassVar[type]
    cost_field: ClassVar[str | None] = None  # the configuration field that sets the cost
    # whether after_attention looks at nothing but the scores and the list of rows, and changes no tokens
    reads_scores_only: ClassVar[bool] = False

    # whether run_blocks_ knows all points of the class: none was overridden below where it comes from
    runs_blocks: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = _owner(cls, "run_blocks_")
        if owner is Method:  # what it knows is what quiet_until says
            owner = _owner(cls, "quiet_until")
        cls.runs_blocks = all(issubclass(owner, _owner(cls, point)) for point in _POINTS)

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model_config: ViTConfig | None = None  # of the models that it runs

    @property
    def counts_are_dynamic(self) -> bool:
        """Whether only the data decides how many tokens live, so that on a GPU the host does not know."""
        return False

    @property
    def reads_class_tokens(self) -> bool:
        """Whether ``readout`` gives the class tokens as they are; a kernel may then read them itself."""
        return type(self).readout is Method.readout

    def attach(self, model: VisionTransformer) -> None:
        """Check the configuration against the model and create parameters; called by each model that it runs."""

    def embed(self, model: VisionTransformer, images: Tensor) -> tuple[RaggedTokens, Any]:
        """Images to live tokens, and the method's state before the first block."""
        return model.embed(images), None

    def before_block(self, index: int, tokens: RaggedTokens, state: Any) -> tuple[RaggedTokens, Any]:
        """Act before block ``index``: most methods select here."""
        return tokens, state

    def scores_at(self, index: int, tracing: bool) -> Literal["class", "mean"] | None:
        """Which token scores block ``index`` must return; ``tracing`` asks for all that a trace shows."""
        return None

    def after_attention(
        self, index: int, tokens: RaggedTokens, state: Any, scores: Tensor | None
    ) -> tuple[RaggedTokens, Any]:
        """Act between the attention and the MLP of block ``index``, with the scores (T, H) asked for."""
        return tokens, state

    def quiet_until(self, index: int) -> int:
        """Behind ``before_block(index)``: up to which block, itself not counted, nothing is asked of the method.

        No scores and none of the points from ``after_attention`` of block ``index`` on; the blocks between may then run
        as one operator. ``index``: it is wanted at once. Not asked where a subclass has points of its own.
        """
        return 0 if self.model_config is None else self.model_config.depth

    def run_blocks_(
        self, index: int, run: BlockRun, tokens: RaggedTokens, state: Any
    ) -> tuple[int, RaggedTokens, Any] | None:
        """Behind ``before_block(index)``: several blocks at once from this one on, in place, in inference without a
        trace, and all that the method does behind each; here those of ``quiet_until``.

        The first block that is still to run comes back, with tokens and state; None: this one must run by itself. Not
        asked where a subclass has points of its own.
        """
        until = self.quiet_until(index)
        done = until > index and blocks_(run, index, until, tokens)
        return (until, tokens, state) if done else None

    def after_block(self, index: int, tokens: RaggedTokens, state: Any) -> tuple[RaggedTokens, Any]:
        """Act after block ``index``."""
        return tokens, state

    def readout(self, first_rows: Tensor, tokens: RaggedTokens, state: Any) -> Tensor:
        """What the classifier sees, before the final norm, (B, D): here the class tokens."""
        return tokens.x[first_rows]

    def extras(self, first_rows: Tensor, states: list[Any]) -> dict[str, Tensor]:
        """What a trace shows of the method, from its states after each block."""
        return {}

    def extra_repr(self) -> str:
        return repr(self.config)


def _owner(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))
