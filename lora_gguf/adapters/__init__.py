"""Adapters as PEFT and others save them: configuration, kinds, updates."""
