"""The callbacks that users add to their Trainer."""
