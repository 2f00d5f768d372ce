"""The field's metrics, from predictions and references alone: no model, no file, no Ray."""
