"""Text streams and tokenizers. Import from the modules: this file stays light so that commands start fast."""
