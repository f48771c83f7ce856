from lora_gguf.cli import main

main()
