"""Export to files that need neither prunekit nor the model's code, verified before they are kept."""
