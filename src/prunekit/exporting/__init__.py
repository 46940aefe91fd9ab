"""Files that need neither prunekit nor the model's code, compared with the model before they are kept."""
