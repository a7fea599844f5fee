def report_html(d): return "<html></html>"
