"""The storybook as training data."""
