"""The command line ``int4-lora``: ``app`` combines the commands, each in its own module."""

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    from int4_lora.integration.cli.app import app

    app()
