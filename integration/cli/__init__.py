"""The command line ``int4-lora``: ``app`` puts the commands together, one file each."""

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    from int4_lora.integration.cli.app import app

    app()
