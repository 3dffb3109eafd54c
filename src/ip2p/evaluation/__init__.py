"""How good an editor is."""
