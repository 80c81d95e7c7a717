"""Adapters to the frameworks people already use."""
