"""What operators say of clients' connections."""

from __future__ import annotations

from mm.config import Config


def warnings_of(**variables: str) -> tuple[str, ...]:
    return Config.from_environment({"KV_STORE": "memory", **variables}).warnings


def test_a_grace_without_an_age_is_worth_a_warning() -> None:
    (warning,) = warnings_of(MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS="5")
    assert "MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS (5) is ignored" in warning
    assert not warnings_of(
        MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS="5", MM_SVC_GRPC_MAX_CONNECTION_AGE_SECS="60"
    )


def test_a_share_of_one_address_above_the_whole_is_worth_a_warning() -> None:
    share = {"MM_SVC_GRPC_MAX_CONNECTIONS_PER_ADDRESS": "50"}
    (warning,) = warnings_of(MM_SVC_GRPC_MAX_CONNECTIONS="10", **share)
    assert "PER_ADDRESS (50) is more than MM_SVC_GRPC_MAX_CONNECTIONS (10)" in warning
    assert not warnings_of(MM_SVC_GRPC_MAX_CONNECTIONS="50", **share)
