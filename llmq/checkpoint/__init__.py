"""Model folders on disk: tensors, the source that is read, the folder that is written."""
