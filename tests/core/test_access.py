"""The file of who may do what: what it says, and what is wrong with it in words."""

from __future__ import annotations

import hashlib
import json

import pytest

from mm.core.access import Role, parse_access, role_of_own

TOKEN = b"correct-horse"
DIGEST = hashlib.sha256(TOKEN).hexdigest()


def of(**entry: object) -> str:
    return json.dumps({"identities": {"shop": {"roles": ["infer"], **entry}}})


def test_somebody_is_known_by_token_and_certificate() -> None:
    access = parse_access(
        of(tokenSha256=[DIGEST.upper()], certificateNames=["DNS:Shop.Example", "URI:spiffe://X/y"])
    )
    shop = access.of_token(TOKEN)
    assert shop is not None
    assert shop.name == "shop"
    assert access.of_token(TOKEN + b"x") is None
    assert access.of_certificate(["CN:shop.example", "DNS:shop.example"]) is shop
    assert access.of_certificate(["URI:spiffe://x/y", "CN:shop.example"]) is None
    assert access.named("shop") is shop
    assert shop.refusal(Role.INFER) == shop.refusal(Role.ANYBODY) == ""
    assert shop.refusal(Role.MANAGE) == '"shop" may not: the call needs the role manage, not infer'
    assert DIGEST not in repr(access)


def test_a_token_that_is_known_counts_before_a_certificate() -> None:
    access = parse_access(of(tokenSha256=[DIGEST], certificateNames=["CN:shop"]))
    shop = access.named("shop")
    assert access.caller([b"Bearer " + TOKEN], None, has_certificate=False) == (shop, True)
    # For the runtime, it seems: who calls is known by the certificate.
    assert access.caller([b"Basic x"], shop, has_certificate=True) == (shop, False)


def test_what_is_not_said_to_be_less_needs_to_manage() -> None:
    assert role_of_own(b"/mmesh.ModelMesh/registerModel") is Role.MANAGE
    assert role_of_own(b"/mmesh.ModelMesh/anything.new") is Role.MANAGE
    assert role_of_own(b"/com.ibm.watson.tas.proto.TasRuntime/getModelStatus") is Role.READ
    assert role_of_own(b"/grpc.health.v1.Health/Check") is Role.ANYBODY


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{}", "Object missing required field `identities`"),
        ('{"identities": {}}', '"identities" is empty, so nobody could call; name somebody'),
        ('{"identities": x}', "line 1, column 16"),
        (of(role="x"), '"shop": Object contains unknown field `role`; allowed: roles, token'),
        (of(roles=["admin"]), '"shop": roles[0] is no role; allowed: read, infer, manage'),
        (of(roles=[]), '"shop": no roles; allowed: read, infer, manage'),
        (of(), '"shop": nothing to know it by; give it tokenSha256 or certificateNames'),
        (of(tokenSha256=["secret"]), '"shop": tokenSha256[0] is no SHA-256 in 64 hexadecimal'),
        (
            of(tokenSha256=[hashlib.sha256().hexdigest().upper()]),
            "tokenSha256[0] is that of an empty",
        ),
        ("\ufeff{}", "begins with a byte order mark"),
        (" \n", "empty; JSON is expected"),
        (of(certificateNames=["shop"]), "certificateNames[0] has not the form CN:NAME"),
        (of(certificateNames=["DNS:a", "URI:é"]), "certificateNames[1] has not the form"),
        (
            json.dumps(
                {
                    "identities": {
                        "a": {"roles": ["read"], "tokenSha256": [DIGEST]},
                        "b": {"roles": ["manage"], "tokenSha256": [DIGEST]},
                    }
                }
            ),
            '"b": a token of "a", too; give each its own',
        ),
        (
            '{"identities": {"a": {"roles": ["read"], "certificateNames": ["CN:x"]},'
            ' "b": {"roles": ["read"], "certificateNames": ["CN:x"]}}}',
            '"b": certificate name "CN:x" is of "a", too; give it to one of them',
        ),
        (
            '{"identities": {"a\\nb": {"roles": ["read"], "certificateNames": ["CN:x"]}}}',
            "is no name for an identity",
        ),
        (
            '{"identities": {"a": {"roles": ["read"], "certificateNames": ["CN:x"]},'
            ' "a": {"roles": ["manage"], "certificateNames": ["CN:x"]}}}',
            '"a" is there twice',
        ),
    ],
)
def test_what_is_wrong_is_told_without_the_value(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_access(text)
    assert complaint in str(caught.value)
    assert "secret" not in str(caught.value)
