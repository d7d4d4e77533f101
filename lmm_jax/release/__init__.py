"""Handing a trained model to others: export, verification, model card."""
