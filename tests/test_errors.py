import pytest

from tiny_diffusers.errors import UserError, exit_status, logger, printable, say


def test_what_a_terminal_obeys_is_spelled_out():
    assert printable("\x1b[31mred\x1b[0m\a") == r"\x1b[31mred\x1b[0m\x07"
    assert printable("a\u202eb\udc80") == r"a\u202eb\udc80"  # text that runs backwards; a byte that is no UTF-8
    assert printable("chat, 猫, é\n") == "chat, 猫, é\n"


def test_messages_and_warnings_are_printable(capsys):
    say("\x1b[2J")
    logger.warning("\x1b[2J")
    printed = capsys.readouterr()
    assert printed.out == "\\x1b[2J\n" and printed.err == "warning: \\x1b[2J\n"


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no\nsuch thing"), 2, "error: no such thing"),
        (FileNotFoundError(2, "No such file", "a/b"), 2, "error: No such file: 'a/b'"),
        (OSError("no connection\nat all"), 2, "error: no connection"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "stopped."),
    ],
)
def test_a_mistake_is_one_line_and_a_status(capsys, error, status, line):
    assert exit_status(lambda: fail(error), "error") == status
    assert capsys.readouterr().err == line + "\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError):
        exit_status(lambda: fail(RuntimeError()), "error")
    assert exit_status(lambda: None, "error") == 0
    assert exit_status(lambda: 3, "error") == 3
