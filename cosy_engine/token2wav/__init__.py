"""Speech tokens to sound: streaming sessions over the flow and the vocoder."""
