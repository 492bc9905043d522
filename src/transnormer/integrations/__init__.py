"""Plugins that put models of this package into the engines of others."""
