"""The storybook models from nothing, one module a stage: `build.run` trains them."""
