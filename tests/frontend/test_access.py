"""Who may use the API: every path with no key, a wrong one and a right one; sizes; other hosts; TLS."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontend.access import MAX_HEADERS, OPEN_PATHS, ApiKeys, check_exposure, check_tls
from frontend.api.openapi import GETS, POSTS
from frontend.api.routes import ROUTES
from protocol.service import CannotRun
from tests.frontend.asking import serve, submitted
from tests.frontend.fakes import Engine, LocalClient

ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789"
TABLE = Path(__file__).parents[2] / "docs" / "access.md"
ROWS = {  # (path, method) -> status without a key, with a wrong one, with a right one; as the docs say
    (path, method): tuple(map(int, statuses))
    for path, method, *statuses in re.findall(r"^\| `(/\S+)` \| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", TABLE.read_text(), re.MULTILINE)
}
SERVED = [(route.path.replace(":path}", "}"), method) for route in ROUTES for method in sorted(route.methods or ()) if method != "HEAD"]
BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/generate": {"prompt": "hi", "max_tokens": 2},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104, 105]},
}


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text(f"# who may\nalice {ALICE}\n\nbob {BOB}\n")
    return str(path)


def ask(tmp_path: Path, method: str, path: str, headers: dict[str, str], engine: Engine | None = None, **settings: Any) -> httpx.Response:
    async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
        body = BODIES.get(path) if method == "POST" else None
        return await http.request(method, path, json=body, headers=headers)

    return serve(scenario, tmp_path, engine, **settings)


@pytest.mark.parametrize(("path", "method"), SERVED)
def test_every_path_answers_by_key_as_the_docs_say(path: str, method: str, tmp_path: Path, key_file: str) -> None:
    def status(headers: dict[str, str]) -> int:
        return ask(tmp_path, method, path.replace("{name}", "oracle"), headers, api_key_file=key_file).status_code

    none, wrong, right = ROWS[path, method]
    assert status({}) == none
    assert status({"authorization": "Bearer nobody-has-this-key"}) == wrong
    assert status({"authorization": f"Basic {ALICE}"}) == wrong
    assert status({"authorization": f"Bearer {ALICE}x"}) == wrong
    assert status({"authorization": f"Bearer {ALICE}"}) == right
    assert status({"authorization": f"Bearer {BOB}"}) == right
    assert none == (200 if path in OPEN_PATHS else 401)


def test_the_docs_and_the_description_name_the_paths_that_are_served() -> None:
    assert sorted(ROWS) == sorted(SERVED)
    assert {path for path, _ in SERVED} == set(GETS) | set(POSTS)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_a_path_that_does_not_exist_is_closed_as_well(method: str, tmp_path: Path, key_file: str) -> None:
    for path in ("/v1/secrets", "/metrics", "/docs", "/", "//v1/models", "/v1/models/../secrets", "/health/", "/Health"):
        for headers, expected in (({}, 401), ({"authorization": f"Bearer {ALICE}"}, 404)):
            assert ask(tmp_path, method, path, headers, api_key_file=key_file).status_code == expected, path


def test_a_wrong_method_is_closed_as_well(tmp_path: Path, key_file: str) -> None:
    assert ask(tmp_path, "DELETE", "/v1/models", {}, api_key_file=key_file).status_code == 401
    assert ask(tmp_path, "DELETE", "/v1/models", {"authorization": f"Bearer {ALICE}"}, api_key_file=key_file).status_code == 405


def test_a_refusal_has_openais_shape(tmp_path: Path, key_file: str) -> None:
    response = ask(tmp_path, "GET", "/v1/models", {}, api_key_file=key_file)
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_keys_name_is_the_tenant_whatever_the_client_says(tmp_path: Path, key_file: str) -> None:
    engine = Engine()
    headers = {"authorization": f"Bearer {BOB}", "x-tenant": "alice"}
    assert ask(tmp_path, "POST", "/v1/completions", headers, engine, api_key_file=key_file).status_code == 200
    assert submitted(engine).tenant == "bob"


def test_without_keys_everything_is_open(tmp_path: Path) -> None:
    assert ask(tmp_path, "GET", "/v1/models", {}).status_code == 200


def test_headers_too_large_are_refused(tmp_path: Path) -> None:
    assert ask(tmp_path, "GET", "/v1/models", {"x-much": "y" * MAX_HEADERS}).status_code == 431


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings"])
def test_what_is_not_there_is_an_openai_shaped_404(path: str, tmp_path: Path) -> None:
    response = ask(tmp_path, "POST", path, {})
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_cors_is_off_unless_an_origin_is_named(tmp_path: Path, key_file: str) -> None:
    preflight = {"origin": "https://page.example", "access-control-request-method": "POST"}
    off = ask(tmp_path, "OPTIONS", "/v1/completions", preflight)
    assert "access-control-allow-origin" not in off.headers
    on = ask(tmp_path, "OPTIONS", "/v1/completions", preflight, cors_origins="https://page.example", api_key_file=key_file)
    assert on.headers["access-control-allow-origin"] == "https://page.example"
    other = ask(
        tmp_path, "OPTIONS", "/v1/completions", preflight | {"origin": "https://other.example"}, cors_origins="https://page.example"
    )
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no key"),
        ("alice", "line 1"),
        ("alice short", "at least"),
        (f"a {ALICE}\na {BOB}", "twice"),
        (f"a {ALICE}\nb {BOB}\nc {ALICE}", "line 3: the key of c is that of a"),
        (f"a {ALICE} more", "NAME KEY"),
    ],
)
def test_a_key_file_that_cannot_be_used_gets_one_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(CannotRun, match=says):
        ApiKeys.read(str(path))
    with pytest.raises(CannotRun):
        ApiKeys.read(str(tmp_path / "none"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_hosts_are_let_in_only_with_keys_or_on_purpose(host: str) -> None:
    with pytest.raises(CannotRun, match="api-key-file"):
        check_exposure(host, "", True)
    check_exposure(host, "keys", True)
    check_exposure(host, "", False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, "", True)


def test_a_certificate_that_cannot_be_read_gets_one_line(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="ssl-certfile"):
        check_tls(str(tmp_path / "none.pem"), "")
    with pytest.raises(CannotRun, match="needs"):
        check_tls("", "key.pem")
    check_tls("", "")


def test_nobody_is_asked_for_the_passphrase_of_a_key(tmp_path: Path) -> None:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:secret", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-keyout", key, "-out", cert], capture_output=True, timeout=60, check=True)
    with pytest.raises(CannotRun, match="encrypted"):
        check_tls(cert, key)
