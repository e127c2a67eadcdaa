"""vLLM servers, whosever model they hold: started, supervised and asked. This process never imports vLLM itself."""
