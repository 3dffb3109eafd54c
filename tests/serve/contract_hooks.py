"""The value that schemathesis sends for OpenAPI's format "picture" (see `test_contract.py`)."""

import base64
import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image

file = io.BytesIO()
Image.new("RGB", (64, 64), "red").save(file, "PNG")
schemathesis.openapi.format("picture", st.just(base64.b64encode(file.getvalue()).decode()))
