"""The page at /docs: all routes, and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re

from shuteye.server.http.docs_page import render


def test_the_page_needs_nothing_from_elsewhere(client):
    """A blank page on a machine without internet, or a visit to somebody's CDN from one that has it."""
    response = client.get("/docs")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    page = response.text
    assert "<script" not in page
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", page)
    policy = response.headers["content-security-policy"]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert client.get("/redoc").status_code == 404


def test_the_page_shows_every_route_and_what_it_takes(client):
    """A route that only the document knows."""
    page = client.get("/docs").text
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert f'{method.upper()}</span><span class="path">{path}<' in page
    assert "<td>level</td><td>query</td><td>0, 1, 2</td>" in page
    assert "<td>level</td><td>application/json</td>" in page
    assert "<td>max_tokens</td><td>application/json</td>" in page


def test_the_page_says_which_routes_need_a_key(client_of, engine):
    """A reader who finds out by a 401."""
    page = client_of(engine, api_key="k", dev_mode=False, admin_api_key="a").get("/docs").text
    assert page.count("needs a key") == page.count("<details>") - len(["health", "load", "ping", "ready", "version"])


def test_text_of_the_openapi_document_is_escaped():
    """A description that becomes markup."""
    operation = {"description": "<b>&", "responses": {"200": {"description": "<i>"}}}
    page = render({"info": {"title": "<x>", "version": "1"}, "paths": {"/<p>": {"get": operation}}})
    for raw in ("<b>", "<i>", "<x>", "<p>&", "/<p>"):
        assert raw not in page.replace("<p>Every", "")
