"""The command line: parse flags, call one function, show its result.

Nothing but ``sys`` is imported before :func:`main` runs: it catches Ctrl-C and takes the working folder off the path.
"""

import sys

_ANYWHERE = ("--debug", "--quiet")
"""Flags of the whole program, accepted before or after the command."""


def main(arguments: list[str] | None = None) -> None:
    """Run cogtune and exit with its status: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        from cogtune.system.safe_path import leave_working_folder_out

        leave_working_folder_out()
        from cogtune.cli.signals import raise_on_signals

        raise_on_signals()
        words = sys.argv[1:] if arguments is None else arguments
        flags = {word for word in words if word in _ANYWHERE}
        words = [word for word in words if word not in _ANYWHERE]
        if "--quiet" in flags:
            words.insert(0, "--quiet")
        _exit(_status(words, "--debug" in flags))
    except KeyboardInterrupt:  # while the program itself was still loading
        _exit(130)  # errors.EXIT_INTERRUPTED, which may not be loaded
    except SystemExit as end:
        _exit(end.code)


def _exit(status: object) -> None:
    """Exit with ``status``; within :func:`main`'s blocks, so that a signal that is sent again until then is caught."""
    ending = sys.modules.get("cogtune.cli.signals")
    if ending is None:  # Ctrl-C came before it was loaded
        sys.exit(130)
    ending.exit_now(status)


def _status(words: list[str], debug: bool) -> int:
    import errno

    import typer

    from cogtune.cli.app import app
    from cogtune.system import console, safe_path
    from cogtune.system.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, CogtuneError
    from cogtune.system.out_of_memory import is_out_of_memory, out_of_memory

    console.open_streams()
    console.quiet_libraries()
    try:
        if words[:1] != ["presets"] and "--help" not in words and not safe_path.has_working_folder():
            raise CogtuneError("the working folder is no longer there", "change to another one, and run this again")
        result = app(words, prog_name="cogtune", standalone_mode=False)
        if result == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C
            console.note("interrupted")
        return result if isinstance(result, int) else 0
    except CogtuneError as error:
        if debug:
            raise
        console.error(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):  # outside of typer
        console.note("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stdout = None
        return EXIT_FAILURE
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG and not debug:
            told = f"{str(error.filename)[:60]}... is too long for a file name"
            console.error(CogtuneError(told, "pass a file or a folder"))
            return EXIT_USAGE
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own word on wrong usage
            if told := error.format_message():  # none where a command without words has shown its help
                told = told.replace("Value error, ", "").replace(": Input should", ": input should")  # pydantic's words
                hint = "run the command with --help to see its options"
                console.error(CogtuneError(told[0].lower() + told[1:], hint))
            return int(error.exit_code)
        if debug:
            raise
        if is_out_of_memory(error):
            console.error(out_of_memory(error, "use a smaller --size; `cogtune presets` lists what fits"))
            return EXIT_FAILURE
        console.error(
            CogtuneError(
                f"unexpected error: {type(error).__name__}: {error}",
                "run the command again with --debug and report the traceback",
            )
        )
        return EXIT_FAILURE
