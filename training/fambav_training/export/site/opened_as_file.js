// No module, because a browser loads none of those from a file.
if (location.protocol === "file:") {
  document.getElementById("status").hidden = true;
  const error = document.getElementById("error");
  error.textContent =
    "Browsers run no model from a file. Serve this folder, for example with `python -m http.server`, and open the address that this prints.";
  error.hidden = false;
}
