"""The pipeline: stages in order, each with a folder, a manifest and a way to go on where it stopped."""
