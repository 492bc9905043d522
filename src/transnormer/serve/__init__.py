"""An HTTP server with OpenAI's interface around the engine, and a page for the browser."""
