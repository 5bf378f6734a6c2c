"""Small components that the tests of the flow package run for real."""
