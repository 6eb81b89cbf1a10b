"""What becomes of a request for a model that sleeps: by whose behalf it sleeps, and the model's policy. One table."""

from __future__ import annotations

from shuteye.fleet.model_spec import SleepingPolicy, SleepOwner

RULES: dict[tuple[SleepOwner, SleepingPolicy | None], SleepingPolicy] = {
    # What the fleet put to sleep by itself, it wakes by itself: a policy is about what people and leases did.
    (SleepOwner.IDLE, None): "wake",
    (SleepOwner.IDLE, "reject"): "wake",
    (SleepOwner.IDLE, "hold"): "wake",
    (SleepOwner.IDLE, "wake"): "wake",
    (SleepOwner.FLEET, None): "wake",
    (SleepOwner.FLEET, "reject"): "wake",
    (SleepOwner.FLEET, "hold"): "wake",
    (SleepOwner.FLEET, "wake"): "wake",
    (SleepOwner.LEASE, None): "hold",  # until the lease ends, or told when
    (SleepOwner.LEASE, "reject"): "reject",
    (SleepOwner.LEASE, "hold"): "hold",
    (SleepOwner.LEASE, "wake"): "wake",  # in room that no lease holds
    (SleepOwner.OPERATOR, None): "reject",
    (SleepOwner.OPERATOR, "reject"): "reject",
    (SleepOwner.OPERATOR, "hold"): "hold",
    (SleepOwner.OPERATOR, "wake"): "wake",
}


def rule(owner: SleepOwner, policy: SleepingPolicy | None) -> SleepingPolicy:
    """What a request does: `wake` the model, `hold` until somebody does, or `reject`: 503."""
    return RULES[owner, policy]
