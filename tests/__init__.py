from mokus.console import hush

hush()  # before anything is imported that imports bitsandbytes: pytest's closing line is the last one printed
