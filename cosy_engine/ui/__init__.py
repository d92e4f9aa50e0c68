"""The web page: Gradio Blocks over the engine, one file a tab."""
