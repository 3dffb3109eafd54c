import js from "@eslint/js";
import globals from "globals";

const unused = { argsIgnorePattern: "^_", varsIgnorePattern: "^_" };

export default [
  js.configs.recommended,
  { languageOptions: { globals: globals.browser } },
  { files: ["tests/**"], languageOptions: { globals: globals.node } },
  {
    rules: {
      eqeqeq: ["error", "always", { null: "ignore" }],
      "no-var": "error",
      "prefer-const": "error",
      "no-unused-vars": ["error", unused],
    },
  },
];
