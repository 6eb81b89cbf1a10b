"""The HTTP server: OpenAI's routes and the sleep controls, over any engine with `AsyncEngine`'s verbs."""
