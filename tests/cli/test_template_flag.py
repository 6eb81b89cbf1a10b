"""`--chat-template`: a file or a text, and what is neither."""

import pytest

from shuteye.cli import main as cli
from shuteye.cli import template_flag

TEMPLATE = "{% for message in messages %}\n{{ message.content }}é\n{% endfor %}"


def template_of(line):
    """The template that a command line asks for."""
    orders = []
    assert cli.run(["serve", *line], serving=lambda order: orders.append(order) or 0) == 0
    return orders[0].engines[0].chat_template


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


def test_a_file_or_its_text_is_taken(file):
    """A path that is rendered as if it were the template, or line ends that are lost."""
    assert template_of(["--chat-template", str(file)]) == TEMPLATE
    assert template_of(["--chat-template", TEMPLATE]) == TEMPLATE
    assert template_of([f"--chat-template={TEMPLATE}"]) == TEMPLATE
    assert template_of([]) is None


def test_environment_and_settings_name_a_file_too(file, tmp_path, monkeypatch):
    """A flag that only the command line has, as containers are set up by variables and files."""
    settings = tmp_path / "shuteye.toml"
    settings.write_text(f'[serve]\nchat-template = "{file}"\n')
    assert template_of(["--config", str(settings)]) == TEMPLATE
    monkeypatch.setenv("SHUTEYE_CHAT_TEMPLATE", str(file))
    assert template_of([]) == TEMPLATE


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{% for %}", "is not a Jinja template"),
        (b"{{ a }}\n{% if %}", "(line 2)"),
        (b"\xff{{ a }}", "is not text in UTF-8"),
        (b"a" * (template_flag.MAX_BYTES + 1), "has more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_template_is_named(file, content, says, capsys, served):
    """A server that loads its model and then refuses every conversation, or reads a file without an end."""
    file.write_bytes(content)
    assert cli.run(["serve", "--chat-template", str(file)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "--chat-template" in said
    assert str(file) in said


@pytest.mark.parametrize("given", ["no/such/file.jinja", "chatml", "", "."])
def test_what_is_neither_file_nor_template_is_refused(given, capsys, served):
    """A misspelt path that is served as a template without a single message."""
    assert cli.run(["serve", "--chat-template", given]) == 2
    assert "no file that can be read" in capsys.readouterr().err


def test_a_text_that_is_no_template_is_refused(capsys, served):
    """A traceback, or a server that starts."""
    assert cli.run(["serve", "--chat-template", "{{ a"]) == 2
    assert "the text is not a Jinja template" in capsys.readouterr().err
