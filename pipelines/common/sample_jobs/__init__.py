"""The plan, the models and the notes of sampled images, which `lfm sample` and the web page share."""
