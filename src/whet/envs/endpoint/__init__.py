"""Programs that play: any client of OpenAI's chat completions, with whet as the endpoint that it asks."""
