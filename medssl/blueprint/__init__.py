"""A recipe for the labelled cases of a store, planned from what they are and what this machine can do."""
