"""Reading and writing what others store: names, safetensors files, configs."""
