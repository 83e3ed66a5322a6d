"""`mokus bench wise`: knowledge of WISE written into the text encoder, and what a vision model sees before and after."""
