"""The optimizer that the peers use by default, from optax."""

import optax


def adamw(
    learning_rate: float = 2e-4,
    *,
    total_steps: int,
    warmup_steps: int = 5,
    schedule: str = "linear",
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with warm-up, decay to zero, and clipping by the global norm.

    Args:
        learning_rate: its peak.
        total_steps: steps until it is zero.
        warmup_steps: steps over which it rises from zero.
        schedule: ``"linear"``, ``"cosine"`` or ``"constant"`` after the warm-up.
        weight_decay: decoupled weight decay (https://arxiv.org/abs/1711.05101).
        max_grad_norm: gradients of a larger global norm are scaled down to it; None leaves them.

    Raises:
        ValueError: unknown schedule, a warm-up as long as the run, or a negative rate.
    """
    if not learning_rate >= 0:
        raise ValueError(f"learning_rate={learning_rate}: it must be at least 0")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must lie in [0, total_steps={total_steps}); "
            "warmup_steps=0 goes without"
        )
    decay_steps = total_steps - warmup_steps
    decays = {
        "linear": optax.linear_schedule(learning_rate, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(learning_rate, decay_steps),
        "constant": optax.constant_schedule(learning_rate),
    }
    if schedule not in decays:
        raise ValueError(f"schedule={schedule!r} is unknown; needed one of {', '.join(decays)}")
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    rate = optax.join_schedules([warmup, decays[schedule]], [warmup_steps])
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    return optax.chain(clip, optax.adamw(rate, weight_decay=weight_decay))
