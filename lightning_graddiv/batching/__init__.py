"""Everything that changes what a batch is."""
